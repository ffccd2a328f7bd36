"""consistency-app: a page to play with a model. `studio` does the work, `page` shows it, `serve` puts it on a port."""
