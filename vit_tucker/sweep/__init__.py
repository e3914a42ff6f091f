"""Many runs from one file: base config x methods x options x seeds, from a shared start."""
