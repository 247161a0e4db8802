"""Other people's learners on token environments, one file each."""
