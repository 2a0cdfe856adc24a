"""What a finished run can be asked: each module is one question, a command, a page of its own and CSV files.

slicetune ask chosen runs/x         # → runs/x/analyses/chosen.html, chosen-*.csv
"""
