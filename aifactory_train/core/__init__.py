"""Ground: errors, output, files, versions of other libraries. Imports nothing else of the project."""
