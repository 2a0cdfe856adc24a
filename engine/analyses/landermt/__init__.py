"""Questions to a finished run of LANDeRMT."""
