"""Long checks of reliability, each a command."""
