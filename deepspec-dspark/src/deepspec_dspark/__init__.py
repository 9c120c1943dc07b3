"""deepspec-dspark."""
