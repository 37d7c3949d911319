"""Where dialogues come from: one file a corpus, each ending in a build.CorpusSpec."""
