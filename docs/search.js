// Search in pages that may be open from the disk, where browsers start no workers and request no files.
document.addEventListener("DOMContentLoaded", () => {
  const input = document.getElementById("properdocs-search-query");
  const results = document.getElementById("properdocs-search-results");
  let index, documents;

  function show() {
    // What has a meaning in queries of lunr separates words here.
    const query = input.value.replace(/[^\p{L}\p{N}]+/gu, " ").trim();
    const found = query.length < 2 ? [] : index.search(query);
    results.replaceChildren(...found.map(({ ref }) => {
      const article = document.createElement("article");
      article.innerHTML = "<h3><a></a></h3><p></p>";
      const link = article.querySelector("a");
      link.href = `${base_url}/${ref}`;
      link.textContent = documents[ref].title;
      article.querySelector("p").textContent = documents[ref].text.slice(0, 200);
      return article;
    }));
    if (query.length >= 2 && !found.length) results.textContent = results.dataset.noResultsText;
  }

  // The index, which is about as long as all pages together, is loaded with the first search.
  function load() {
    const script = document.createElement("script");
    script.src = `${base_url}/search/index.js`;
    script.onload = () => {
      documents = Object.fromEntries(searchIndex.docs.map((doc) => [doc.location, doc]));
      index = lunr(function () {
        this.ref("location");
        this.field("title", { boost: 10 });
        this.field("text");
        searchIndex.docs.forEach((doc) => this.add(doc));
      });
      input.addEventListener("input", show);
      show();
    };
    document.head.append(script);
  }

  const asked = new URLSearchParams(location.search).get("q");
  if (asked === null) input.addEventListener("focus", load, { once: true });
  else {
    input.value = asked;
    load();
  }
});
