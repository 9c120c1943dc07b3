"""Run files: one TOML file, flat and complete, structured strictly into frozen options."""
