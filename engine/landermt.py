"""LANDeRMT: detect layers and units, route language pairs through them, train, export, fold to one pair.

In the order of a run: detect and detection (what is counted), awareness (what is made of it), routes (the artefact),
routed and routing (the model), export and fold (what is kept). stages.py calls the first three.
"""
