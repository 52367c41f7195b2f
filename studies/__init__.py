"""Studies: protocols, experiments and their recorded rows; not part of the library."""
