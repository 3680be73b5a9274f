"""What to do about a sensitivity map: recommendations, and what a migration should validate first."""
