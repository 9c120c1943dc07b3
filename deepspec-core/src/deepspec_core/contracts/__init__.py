"""The contracts between core, algorithms and families: data classes and protocols, no behaviour of their own."""
