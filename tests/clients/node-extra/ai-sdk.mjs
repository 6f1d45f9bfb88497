// Vercel's AI SDK in its defaults, through both of its providers.
import { note, print, told } from './ask.mjs';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { embed, embedMany } from 'ai';

const { baseURL, apiKey, model, slashed, texts, many } = told;
const providers = {
  openai: (options) => createOpenAI({ baseURL, apiKey, ...options }),
  compatible: (options) => createOpenAICompatible({ name: 'gateway', baseURL, apiKey, ...options }),
};

for (const [name, provider] of Object.entries(providers)) {
  const key = name === 'openai' ? 'openai' : 'openaiCompatible'; // under which a provider reads its options
  const made = (id = model, options) => provider(options).embeddingModel(id);
  const all = async (asked) => {
    const { embeddings, usage, values } = await embedMany(asked);
    return { embeddings, tokens: usage.tokens, values: values.length };
  };
  await note(`${name}: one`, async () => (await embed({ model: made(), value: texts[0] })).embedding);
  await note(`${name}: list`, () => all({ model: made(), values: texts }));
  await note(`${name}: slashed`, () => all({ model: made(slashed), values: texts }));
  await note(`${name}: slash`, () => all({ model: made(model, { baseURL: `${baseURL}/` }), values: texts }));
  const cut = (dimensions) => ({ [key]: { dimensions, user: 'user-1' } });
  await note(`${name}: dimensions`, () => all({ model: made(), values: texts, providerOptions: cut(256) }));
  await note(`${name}: many`, () => all({ model: made(), values: many, providerOptions: cut(16) }));
  await note(`${name}: wrong key`, () => embed({ model: made(model, { apiKey: 'sk-wrong' }), value: 'hi' }));
  await note(`${name}: unknown model`, () => embed({ model: made('text-embedding-9'), value: 'hi' }));
  await note(`${name}: empty`, () => all({ model: made(), values: ['a', '', 'b'] }));
}
print();
