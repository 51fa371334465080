"""Workers: many searches at once, in this process or on many devices, with results one by one as they are ready."""
