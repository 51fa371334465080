"""How is what the package bundles made? Run from the repository; the package imports none of it."""
