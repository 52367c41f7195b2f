"""Studies: protocols, runners, rows and what they found; no part of the library."""
