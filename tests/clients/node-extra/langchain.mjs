// LangChain JS in its defaults.
import { note, print, told } from './ask.mjs';
import { OpenAIEmbeddings } from '@langchain/openai';

const { baseURL, apiKey, model, slashed, texts, many } = told;
const made = (options) => new OpenAIEmbeddings({ model, apiKey, configuration: { baseURL }, ...options });

await note('documents', () => made().embedDocuments(texts));
await note('query', () => made().embedQuery(texts[0]));
await note('slashed', () => made({ model: slashed }).embedDocuments(texts));
await note('newlines kept', () => made({ stripNewLines: false }).embedDocuments(texts));
await note('dimensions', () => made({ dimensions: 256 }).embedDocuments(texts));
await note('numbers', () => made({ encodingFormat: 'float' }).embedDocuments(texts));
await note('many', () => made({ dimensions: 16 }).embedDocuments(many));
await note('wrong key', () => made({ apiKey: 'sk-wrong' }).embedQuery('hi'));
await note('unknown model', () => made({ model: 'text-embedding-9' }).embedQuery('hi'));
await note('empty', () => made().embedDocuments(['a', '', 'b']));
print();
