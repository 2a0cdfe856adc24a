"""What a finished run can be asked: each module is one question, a page of its own and CSV files.

slicetune ask chosen runs/x         # → runs/x/analyses/chosen.html, chosen-*.csv
"""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m` one of these modules, which were commands once: it would do nothing
    print("error: a question is asked by the command: slicetune ask QUESTION RUN", file=sys.stderr)
    sys.exit(2)
