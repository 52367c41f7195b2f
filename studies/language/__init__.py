"""Study of the window's position on a language model that learns German or C++: its protocol, model and texts."""
