"""How a run runs: config, processes, engine, loop, checkpoint, metrics. Knows no model, no loss, no data set."""
