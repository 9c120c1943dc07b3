"""deepspec-eagle3."""
