// The prompt guide of a model with a small vocabulary: example prompts and words to insert.

const byId = (id) => document.getElementById(id);

export function showGuide(guide, { onexample, onword }) {
  byId('guide').hidden = !guide;
  if (!guide) return;
  byId('about').textContent = guide.about;
  byId('examples').replaceChildren(...guide.examples.map((text) => item(text, onexample)));
  byId('words').replaceChildren(...guide.words.flatMap(({ name, words }) => {
    const heading = document.createElement('h2');
    const list = document.createElement('ul');
    heading.textContent = name;
    list.replaceChildren(...words.map((word) => item(word, onword)));
    return [heading, list];
  }));
}

function item(text, onclick) {
  const button = document.createElement('button');
  const entry = document.createElement('li');
  Object.assign(button, { type: 'button', textContent: text });
  button.addEventListener('click', () => onclick(text));
  entry.append(button);
  return entry;
}
