"""What does a run do? Drivers, files and stores."""
