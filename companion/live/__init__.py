"""A model that answers inside a static page: `engine.mjs` runs it, `state` writes what it needs."""
