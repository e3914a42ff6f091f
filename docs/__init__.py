"""The documentation; a package, so that its hooks are imported from here whatever else is called docs."""
