"""Progress display, samples, images for trackers, figures, guard rails and checkpoints."""
