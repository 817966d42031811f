"""Stage programs: what they may say, how they are checked, and how they are run."""
