"""What every method must do, on a tiny random model made on the spot: `forgetless check NAME`."""
