"""The pages: of a run (run.py, its tables in sections.py), of a comparison, of an analysis (answer.py)."""
