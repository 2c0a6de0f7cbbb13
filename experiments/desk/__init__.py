"""The paper's findings at desk scale: small models on a synthetic story world."""
