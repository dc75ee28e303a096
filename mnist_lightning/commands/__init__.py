"""The command line: parsing, explaining what is wrong, running; export; the demo page."""
