"""`hasten demo`: a Gradio page that shows what the library does, each claim beside what it is measured against."""
