"""What a person reads after a search: the report of a run.

The modules are imported by name: each pulls in libraries (Matplotlib, Jinja) that `import fliqs_hf` must not wait for.
"""
