"""Models, folders and processes that several test files share."""
