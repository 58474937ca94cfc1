"""Making data: pictures of public sets (`convert_it`), instructions about them (`syphus`)."""
