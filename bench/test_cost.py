"""What the paper's model costs, counted, against closed forms. Deterministic: nothing is timed here."""
