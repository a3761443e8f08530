"""The frontier study: every mechanism at several strengths, accuracy beside what is read."""
