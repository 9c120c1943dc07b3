"""deepspec-dflash."""
