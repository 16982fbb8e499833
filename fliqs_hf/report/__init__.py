"""What a person reads after a search: the report of a run, and a quantized model compared with its original.

The modules are imported by name, `from fliqs_hf.report.validate import validate`: each pulls in libraries (SciPy,
statsmodels, Matplotlib, Jinja) that `import fliqs_hf` must not wait for.
"""
