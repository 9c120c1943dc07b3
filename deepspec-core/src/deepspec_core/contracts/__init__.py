"""The contracts between core, algorithms and families: data classes and protocols without behaviour."""
