"""A quantized model measured against its original on the same images.

The modules are imported by name, `from fliqs_hf.validation.validate import validate`: each pulls in libraries (SciPy,
statsmodels, Matplotlib, Jinja) that `import fliqs_hf` must not wait for.
"""
