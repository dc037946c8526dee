"""Weight mixing: several checkpoints of one model become one (SPHINX, section 3.1)."""
