"""The two kinds of models that a table can teach: language models and classifiers, each told in one file."""
