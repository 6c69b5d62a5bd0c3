"""What a person sees of a run: a progress display, samples, pictures for trackers, figures."""
