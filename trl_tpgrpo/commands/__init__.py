"""The subcommands of `trl-tpgrpo`, one module each with a `main(argv)`."""
