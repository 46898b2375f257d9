"""What a user starts: batch jobs, the demo, and the `tandem` command."""
