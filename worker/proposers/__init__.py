"""Where draft tokens come from: one module for each method, all behind `base.Proposer`."""
