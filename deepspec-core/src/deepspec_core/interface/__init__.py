"""The Python interface: what `import deepspec_core` offers. ../__init__.pyi lists the names."""
