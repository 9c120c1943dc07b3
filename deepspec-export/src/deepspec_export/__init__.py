"""deepspec-export."""
