"""The command line: main.py finds the verb, and every verb is a file of its own."""
