"""Commands, configs and studies, and what only they need."""
