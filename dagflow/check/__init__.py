"""The check before the first step: what dagflow will compute against the user's own model, run eagerly."""
